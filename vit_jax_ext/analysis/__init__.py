"""Looks at models from outside; nothing but the command line imports it."""
