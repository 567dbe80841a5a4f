"""Is a model with streams worth it? Fit the published runs, then ask the law and the cost model.

python examples/scaling_law.py
python examples/scaling_law.py --config path/to/config.json --hardware rtx-4090 --num-streams 4
"""

from __future__ import annotations

import argparse

from parscale.scaling_laws import crossover, fit, published, published_models, read_shape, versus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a config.json or its folder; default: the published 1.6B model")
    parser.add_argument("--hardware", default="a100-80gb")
    parser.add_argument("--num-streams", type=int, default=8)
    arguments = parser.parse_args()
    shape = read_shape(arguments.config or published_models()["1.6B"])
    streams, hardware = arguments.num_streams, arguments.hardware

    law = fit(*published("stack"), bootstrap=1000)
    assert law.intervals is not None
    low, high = law.intervals["k"]
    print(f"Each stream: k = {law.k:.3f}, 90 % interval {low:.3f} to {high:.3f}")

    params = shape.params(streams)
    print(f"{params / 1e9:.2f}B parameters with P = {streams}: predicted loss {law.predict(params, streams):.4f}")
    print(f"a plain model needs {law.equivalent_params(params, streams) / 1e9:.2f}B for that")

    print(f"\nCost beside that plain model on {hardware}, 256 tokens in and out:")
    for batch in (1, 4, 16, 64):
        comparison = versus(law, shape, num_streams=streams, batch_size=batch, hardware=hardware)
        memory, time = comparison.ratio("memory_bytes"), comparison.ratio("seconds")
        print(f"  batch {batch:3}: {memory:4.2f} times the memory, {time:4.2f} times the time")
    batch = crossover(law, shape, num_streams=streams, hardware=hardware)
    print("  not slower at large batches" if batch is None else f"  slower from batch {batch} on")


if __name__ == "__main__":
    main()
