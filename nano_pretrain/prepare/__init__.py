"""From pinned packages to tokenised shards: fetch, extract, clean, select, tokenise, write."""
