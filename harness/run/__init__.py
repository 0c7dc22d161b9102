"""One case, run on the CPU and on a device, measured and judged."""
