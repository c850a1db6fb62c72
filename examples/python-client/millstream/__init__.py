"""A Millstream client: rows of Postgres in a local SQLite file, written to with or without a network."""

from .client import Client
from .store import Store, delete, insert, update, uuid7

__all__ = ["Client", "Store", "delete", "insert", "update", "uuid7"]
