#!/bin/sh
# Describes the images and videos that are chosen in the Finder: each text goes into a file beside
# its picture (photo.jpg.txt), and all of them to the clipboard.
#
# In Automator: a new Quick Action that receives image files or movie files in Finder, with one step,
# "Run Shell Script": shell /bin/sh, input passed "as arguments", and these lines. It is then in the
# Finder's context menu under Quick Actions. In Shortcuts: the same step, in a shortcut that is shown
# as a Quick Action and takes images and media, with its input passed "as arguments".
#
# In a terminal:  sh quick_action.sh *.jpg
#
# The Finder does not know your shell's settings: name the command and the model here. The model is
# to have been downloaded before, by asking it something in a terminal.

onevision=${ONEVISION_COMMAND:-mlx-onevision}
model=${ONEVISION_MODEL:-7b}
question=${ONEVISION_QUESTION:-Describe this image in one or two sentences.}
PATH=$HOME/.local/bin:/opt/homebrew/bin:/usr/local/bin:$PATH

set -u
texts=$(mktemp) && problem=$(mktemp) || exit 1
trap 'rm -f "$texts" "$problem"' EXIT

# Prints what is said of the file $1.
describe() {
    case $(printf '%s' "$1" | tr '[:upper:]' '[:lower:]') in
    *.mp4 | *.m4v | *.mov | *.mkv | *.webm | *.avi)
        "$onevision" describe --model "$model" "$1"
        ;;
    *)
        "$onevision" generate --model "$model" --image "$1" --prompt "$question" --no-stream
        ;;
    esac
}

good=0
failed=0
for file in "$@"; do
    beside=$file.txt
    if [ -e "$beside" ]; then
        printf '%s is there already; remove it first\n' "$beside" >&2
        failed=$((failed + 1))
    elif said=$(describe "$file" 2>"$problem"); then
        printf '%s\n' "$said" >"$beside" || exit 1
        printf '%s\n%s\n\n' "${file##*/}" "$said" >>"$texts"
        good=$((good + 1))
    else
        tail -n 1 "$problem" >&2
        failed=$((failed + 1))
    fi
done

if command -v pbcopy >/dev/null; then
    pbcopy <"$texts"
else
    cat "$texts"
fi
summary="$good described"
[ "$failed" -eq 0 ] || summary="$summary, $failed not"
if command -v osascript >/dev/null; then
    # As an argument, not as a part of the script.
    osascript -e 'on run {said}' -e 'display notification said with title "OneVision"' -e 'end run' \
        "$summary" >/dev/null
else
    printf '%s\n' "$summary" >&2
fi
[ "$failed" -eq 0 ]
