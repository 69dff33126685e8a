"""Difficulty of examples: proxy scores, their agreement, and forget sets by rank."""
