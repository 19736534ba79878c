"""Mesh programs: what all cores do together for one part of a model, composed of launches and moves."""
