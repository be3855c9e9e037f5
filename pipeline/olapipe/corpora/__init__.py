"""Kinds of corpora, a file each: folders, conversations, tar and parquet files. All yield `Entry` in a fixed order."""
