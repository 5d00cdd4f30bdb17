"""The authors' released checkpoint: its pickle, read without running it, its adapters, and what becomes of both."""
