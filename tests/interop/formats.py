# SPDX-License-Identifier: MIT
"""The writable formats but qcow2, and what tests may ask of each.

A new format adds rows here, and is tested by test_formats_*.py as the others are.
"""
from dataclasses import dataclass

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Shape:
    """One way to create a format, by strata's option names and the peer's."""
    fmt: str
    options: str = ""       # of strata create -o
    peer_options: str = ""  # of qemu-img create -o; None: it cannot make these
    checked: bool = True    # qemu-img can check it
    peer_writes: bool = True
    backing: bool = False   # may have a backing file
    exact: bool = True      # any size in sectors is kept
    sets_backing: bool = True  # and record another backing file, and another size
    files: bool = False     # the data lies in files of their own
    size: int = 21 * MIB    # of the disks that tests make

    def __str__(self):
        return "-".join(filter(None, [self.fmt, self.options.replace("=", "_")]))


SHAPES = [
    Shape("vdi"),
    Shape("vdi", "static=on", "static=on"),
    Shape("vdi", "block_size=64k", None, peer_writes=False, checked=False),
    Shape("vpc", checked=False, exact=False),
    Shape("vpc", "force_size=on", "force_size=on", checked=False),
    Shape("vpc", "subformat=fixed,force_size=on", "subformat=fixed,force_size=on", checked=False),
    Shape("vhdx", size=40 * MIB),
    Shape("vhdx", "block_size=1M,block_state_zero=off", "block_size=1M,block_state_zero=off"),
    Shape("vhdx", "subformat=fixed,block_size=2M", "subformat=fixed,block_size=2M"),
    Shape("parallels"),
    Shape("parallels", "cluster_size=64k", "cluster_size=64k"),
    Shape("qcow", backing=True, checked=False, sets_backing=False),
    Shape("qed", backing=True),
    # Beyond 16 MiB of such clusters qemu-img finds leaks in what it wrote itself.
    Shape("qed", "cluster_size=4k,table_size=2", "cluster_size=4k,table_size=2", backing=True,
          size=9 * MIB),
    Shape("qed", "cluster_size=1M,table_size=2", "cluster_size=1M,table_size=2"),
    Shape("vmdk"),
    # qemu-io drops the grains that it zeroes, and nothing gives them back.
    Shape("vmdk", "zeroed_grain=on", "zeroed_grain=on", checked=False),
    Shape("vmdk", "subformat=twoGbMaxExtentSparse", "subformat=twoGbMaxExtentSparse",
          files=True),
    Shape("vmdk", "subformat=monolithicFlat", "subformat=monolithicFlat", files=True),
    # qemu-img refuses its own images with tables of one cluster, and overflows with these sizes.
    Shape("qed", "cluster_size=4k,table_size=1", None, peer_writes=False),
    Shape("qed", "cluster_size=4M,table_size=16", None, peer_writes=False),
]
