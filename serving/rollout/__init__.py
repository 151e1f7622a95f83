"""Which bundles answer whom, and how that is changed: champion, canary, shadow."""
