# Command lines: reading options, and passing lists of arguments on, NUL-separated (mapfile -d '').
# shellcheck shell=bash

# Prints an error and exits with 2, the code for invalid input ("user error" below).
die() {
  echo "error: $*" >&2
  exit 2
}

# Prints its arguments NUL-separated.
print0() {
  [ $# -eq 0 ] || printf '%s\0' "$@"
}

# Prints the value of an option among arguments, given as --option VALUE or --option=VALUE.
value_of() {
  local option=$1
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      "$option") echo "${2:-}"; return ;;
      "$option"=*) echo "${1#*=}"; return ;;
    esac
    shift
  done
}

# Prints the arguments without these options (one word, separated by spaces) and their values, NUL-separated.
without_options() {
  local options=" $1 "
  shift
  while [ $# -gt 0 ]; do
    if [[ $options != *" ${1%%=*} "* ]]; then
      print0 "$1"
    elif [[ $1 != *=* && $# -gt 1 ]]; then
      shift
    fi
    shift
  done
}

# Prints a command as a line for the shell, quoted where necessary.
quoted() {
  local word line=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:,=%@+-]+$ ]] || word=${word@Q}
    line+=("$word")
  done
  echo "${line[*]}"
}

# Earlier names, for jobs that were queued before the functions were renamed: SLURM runs its own copy of their script.
without() { without_options "$@"; }
typed() { quoted "$@"; }
listed() { print0 "$@"; }

# Prints its arguments, joined by "and".
joined() {
  local text=$1
  shift
  [ $# -eq 0 ] || printf -v text '%s' "$text" "${@/#/ and }"
  echo "$text"
}
