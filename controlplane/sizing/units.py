"""Bytes as people read them."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def format_bytes(amount: int) -> str:
    """Writes an amount of memory with its unit: `5.8 MiB`, `16 KiB`, `3.0 GiB`."""
    if amount >= GIB:
        return f"{amount / GIB:.1f} GiB"
    if amount >= MIB:
        return f"{amount / MIB:.1f} MiB"
    if amount >= KIB:
        return f"{amount / KIB:.1f} KiB".replace(".0 KiB", " KiB")
    return f"{amount} B"
