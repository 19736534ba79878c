"""Looking at models: which layers bear sparse attention, and what trains a router."""
