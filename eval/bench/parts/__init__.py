"""Parts of a decoding step, timed alone: a module a part, each a subcommand of ``attnpred bench``."""
