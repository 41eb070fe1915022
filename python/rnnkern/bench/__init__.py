"""What the benchmark suites share: named workloads and the peers they are compared with."""
