from zili.cli import main

main()
