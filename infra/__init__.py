"""What outlives a run: buckets, identities, secrets, clusters. Nothing is declared here yet;
`launcher` may import this package, never the other way round."""
