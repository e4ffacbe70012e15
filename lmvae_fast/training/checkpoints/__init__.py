"""Checkpoints that survive a kill at any instant, and whether a run may go on from one."""
