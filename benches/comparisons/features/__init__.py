"""How each library collects gradient features: one file each.

Every function takes the same model, data and settings and returns [examples, width] features, or
what the library has in their place, from a cold start: what it sets up is part of its time.
"""
