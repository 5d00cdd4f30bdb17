"""Projects: a repository's ``amoeba.toml`` and everything that ``amoeba build`` does with it."""
