"""Models whose weights are on several devices, or offloaded.

- `parallel`: tensor parallelism, FSDP, DeepSpeed ZeRO-3
- `offloading`: weights that accelerate keeps on the CPU or on a disk
- `processes`: how many a launcher has started

May import: `compat`.
"""
