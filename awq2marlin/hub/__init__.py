"""From the Hub and to it: where a conversion's shards come from, and where they go."""
