"""Commands of the repository; installed as `dn_detr.tools`."""
