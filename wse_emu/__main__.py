"""``python -m wse_emu`` is ``wse-emu``."""

from wse_emu.cli.entry import main

if __name__ == "__main__":
    main()
