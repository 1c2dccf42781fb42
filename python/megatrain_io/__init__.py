"""Train language models that fit neither the GPU nor the RAM: NVMe is the memory, with the same bits."""
