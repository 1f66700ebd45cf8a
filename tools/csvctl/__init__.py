"""csvctl: the admin tool."""
