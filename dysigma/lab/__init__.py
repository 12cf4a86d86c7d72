"""The lab: races of many trainings, what they say about speed, runs side by side, benchmarks."""
