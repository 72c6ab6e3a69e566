"""How trained models attend: similarity of their attention maps, and BOAT's clusters."""
