"""The launchers and the benchmarks: links to the repository's, of which a wheel has copies."""
