"""The command line: ``wse-emu run | verify | plan | cache``."""
