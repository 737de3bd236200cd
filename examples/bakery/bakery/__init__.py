"""The books of a bakery: receipts come in from the tills, sales are entered, each day has its report."""
