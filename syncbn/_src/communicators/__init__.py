"""The engines that join replicas, behind one protocol."""
