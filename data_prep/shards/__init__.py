"""Shard sets, local and remote. Start at format.py; writer.py packs records, reader.py opens and verifies sets."""
