"""profile -> allocate -> apply -> compare: the only place that knows the order of the stages."""
