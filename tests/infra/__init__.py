"""Real programs for the tests of jobs: Slurm on loopback, hosts of network namespaces, a Docker engine."""
