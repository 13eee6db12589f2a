"""What the library costs, in ratios measured side by side; `python -m benchmarks` writes docs/benchmarks.md."""
