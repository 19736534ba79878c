"""Looking at models: which layers bear sparse attention."""
