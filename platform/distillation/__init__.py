"""The distillation objective in parts: soft losses, matches, schedules, projections."""
