const plot = document.getElementById('{plot_id}');
const pictures = PICTURES;
const card = document.createElement('img');
card.style.cssText = 'position:fixed;display:none;pointer-events:none;border:2px solid #333;background:#fff;z-index:9';
document.body.appendChild(card);
plot.on('plotly_hover', function (event) {
  const data = event.points[0].customdata;
  if (!data || pictures[data[0]] === undefined) return;
  card.src = 'data:image/jpeg;base64,' + pictures[data[0]];
  card.style.left = Math.min(event.event.clientX + 18, window.innerWidth - 190) + 'px';
  card.style.top = Math.min(event.event.clientY + 18, window.innerHeight - 190) + 'px';
  card.style.display = 'block';
});
plot.on('plotly_unhover', function () { card.style.display = 'none'; });
