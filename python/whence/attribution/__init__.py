"""From a query's loss to the training examples that made it so. Imports torch."""

from whence.attribution.queries import query, query_rows

__all__ = ["query", "query_rows"]
