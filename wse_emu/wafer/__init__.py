"""The machine without a model: cores and their SRAM, the fabric, placement, launches and the ledger."""
