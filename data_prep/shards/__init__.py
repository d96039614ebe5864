"""Shard sets on disk and at addresses: start at format.py; writer.py packs records, reader.py opens and verifies."""
