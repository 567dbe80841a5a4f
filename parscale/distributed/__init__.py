"""Models whose weights lie on several devices, or elsewhere while nothing runs.

- `parallel`: tensor parallelism, FSDP, DeepSpeed ZeRO-3
- `offloading`: weights that accelerate keeps on the CPU or on a disk

May import: nothing of the package.
"""
