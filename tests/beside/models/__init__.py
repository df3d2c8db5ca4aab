raise SystemExit("a package of the user was imported instead of that of Torus")
