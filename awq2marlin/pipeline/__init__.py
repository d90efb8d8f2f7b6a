"""From a plan to files on disk or on the Hub: every shard read once, written once, compared."""
