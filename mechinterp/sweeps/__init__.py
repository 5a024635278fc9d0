"""Long runs: a spec, its work items, a ledger of what is done, and who does them."""
