#!/usr/bin/env bash
# Makes the pictures of docs/report.md and docs/index.md: trains the laptop recipe and its two baselines, writes the
# report, and photographs it and TensorBoard with Debian's chromium. About six minutes on two idle cores.
#
#     docs/images/report.sh [DIR]      DIR: where the runs are or will be; default: runs/pictures
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
runs=$(realpath -m "${1:-runs/pictures}")
profile=$(mktemp -d)
port=6123
trap 'kill "${board:-}" 2>/dev/null || true; rm -rf "$profile"' EXIT

# photograph ADDRESS PNG WIDTH HEIGHT [OPTION ...]
photograph() {
  chromium --headless=new --no-sandbox --disable-gpu --hide-scrollbars --allow-file-access-from-files \
    --user-data-dir="$profile" --virtual-time-budget=20000 --window-size="$3,$4" "${@:5}" \
    --screenshot="$2" "$1" 2>/dev/null
}

[ -f "$runs/compare.png" ] || "$python" recipes/pretrain.py fit --config recipes/configs/laptop.yaml \
  --trainer.default_root_dir "$runs" --compare true
"$python" -m am_lightning.recipes report "AM-AdamW 0.8=$runs" \
  "AdamW 0.9=$runs/compare/adamw-0.9" "AdamW 0.8=$runs/compare/adamw-0.8" -o "$runs/report.html"

cp "$runs/compare.png" docs/images/compare.png
# Without the table and throughput, whose tokens/s are those of whatever else this machine does.
cat > "$runs/curves.html" <<'END'
<body style="margin:0"><iframe id="page" src="report.html" style="border:0;width:1200px;height:1330px"></iframe><script>
onload = () => {
  const page = document.getElementById("page").contentDocument;
  const shown = ["Loss", "Momentum, mean over all tensors", "Tensors at the cap"];
  page.querySelector("section").hidden = true;
  for (const chart of page.querySelectorAll("#charts .chart")) chart.hidden = !shown.includes(chart.querySelector("h3").textContent);
};
</script></body>
END
photograph "file://$runs/curves.html" docs/images/report.png 1200 1330
# The front page's: the losses and the map, legible on a phone too, for light and for dark pages.
cat > "$runs/front.html" <<'END'
<body style="margin:0"><iframe id="page" src="report.html" style="border:0;width:500px;height:690px"></iframe><script>
onload = () => {
  const page = document.getElementById("page").contentDocument;
  page.head.insertAdjacentHTML("beforeend", `<style>
    h1, h2, .quiet, section:not(:has(#charts, #heatmaps)) { display: none !important; }
    html { scrollbar-gutter: auto; } body { padding: 4px 8px; } #charts .chart text { font-size: 14px; } #heatmaps { margin-top: 12px; }
    #legend { flex-wrap: wrap; border: 0; } #legend button { font-size: 14px; min-height: 30px; padding: 2px 10px; }
  </style>`);
  for (const chart of page.querySelectorAll("#charts .chart")) chart.hidden = chart.querySelector("h3").textContent != "Loss";
};
</script></body>
END
photograph "file://$runs/front.html" docs/images/front-light.png 500 690 --force-device-scale-factor=2
photograph "file://$runs/front.html" docs/images/front-dark.png 500 690 --force-device-scale-factor=2 --force-dark-mode
# Chromium's windows are at least 500 wide: two phones are frames in one.
cat > "$runs/phones.html" <<'END'
<body style="margin:0;background:#b4bac0;display:flex;gap:20px"><iframe src="report.html"></iframe><iframe src="report.html"></iframe>
<style>iframe { border: 0; flex: none; width: 390px; height: 1000px; }</style><script>
onload = () => {
  const [first, second] = [...document.querySelectorAll("iframe")].map((frame) => frame.contentDocument);
  first.querySelector("section").hidden = true;
  second.querySelector("#heatmaps").closest("section").scrollIntoView();
};
</script></body>
END
photograph "file://$runs/phones.html" docs/images/report-phone.png 800 1000
# tensorboard LOGDIR PNG HEIGHT: its Custom Scalars, from the folder above, so that the page names runs as the text does.
tensorboard() {
  (cd "$runs/.." && exec "$python" -m tensorboard.main --logdir "$1" --port "$port" > /dev/null 2>&1) & board=$!
  sleep 15
  photograph "http://localhost:$port/?darkMode=false#custom_scalars" "$2" 1500 "$3"
  kill "$board"
  wait "$board" || true
}
tensorboard "${runs##*/}" docs/images/tensorboard.png 765
# Of one run, as the others have no momentum of their own: the page's last part, without the throughput above it.
tensorboard "${runs##*/}/logs" "$runs/whole.png" 2150
"$python" -c 'import sys; from PIL import Image
Image.open(sys.argv[1]).crop((360, 1140, 1500, 2130)).quantize(128).save(sys.argv[2], optimize=True)' \
  "$runs/whole.png" docs/images/tensorboard-momentum.png
ls -l docs/images/{compare,report,front-light,front-dark,report-phone,tensorboard,tensorboard-momentum}.png
