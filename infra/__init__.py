"""What outlives a run: buckets, identities, secrets, registries, declared with Pulumi. `launcher`
may import this package, never the other way round."""
