"""Studies: small models trained from several seeds, to answer one question."""
