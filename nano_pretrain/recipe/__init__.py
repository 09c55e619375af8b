"""The recipe: typed schema, loading, cross-field rules and derived numbers. Imports no torch."""
