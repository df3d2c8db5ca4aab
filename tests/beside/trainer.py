raise SystemExit("a module of the user was imported instead of a package of Torus")
