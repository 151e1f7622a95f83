"""Feast plug-ins: exact point-in-time joins, an embedded online store, fast materialisation.

Feast stays the catalogue and the contract (entities, views, services, watermarks, push); these
classes replace its inner paths and are named by class path in the Feast configuration.

- ``offline.AsofOfflineStore``: training rows, each as known at its own time.
- ``online.SnapshotOnlineStore``: versioned Arrow files that a server maps into memory.
- ``engine.SnapshotComputeEngine``: from the one to the other without a protobuf per cell.
- ``snapshot.Snapshot``: reads such files without Feast; this is what a serving replica uses.
"""
