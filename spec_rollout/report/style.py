"""The style sheet of the page."""

CSS = r"""
:root{color-scheme:light;--ink:#1d2229;--soft:#5b616b;--line:#e3e6ea;--bg:#f6f7f9}
*{box-sizing:border-box}
body{
  margin:0;background:var(--bg);color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;margin:0 0 4px}
h2{font-size:18px;margin:36px 0 12px}
h3{font-size:15px;margin:0}
.soft,figcaption p,.facts{color:var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;margin:14px 0;padding:0;list-style:none}
.legend i{
  display:inline-block;width:14px;height:14px;border-radius:3px;margin-right:7px;
  vertical-align:-2px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:16px}
.grid.two{grid-template-columns:repeat(auto-fill,minmax(460px,1fr))}
figure,.card{
  background:#fff;border:1px solid var(--line);border-radius:8px;margin:0;padding:14px 16px}
figure svg{display:block;width:100%;height:auto;font-family:inherit;margin-top:8px}
figcaption p{margin:2px 0 0;font-size:13px;line-height:1.35}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
tr:last-child td{border-bottom:0}
thead th{font-weight:600;color:var(--soft);font-size:13px}
table.dense{font-size:13px}
table.dense th{white-space:normal;vertical-align:bottom}
table.dense td,table.dense th{padding:6px 7px}
table.facts td{white-space:normal;text-align:left}
table.facts td:first-child{width:190px;color:var(--soft)}
pre{
  margin:0;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
  white-space:pre-wrap;overflow-wrap:anywhere}
details{margin:10px 0}
summary{cursor:pointer;font-weight:600}
details>.card,details>.samples{margin-top:10px}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(460px,1fr));gap:16px}
.sample{
  background:#fff;border:1px solid var(--line);border-radius:8px;padding:12px 16px;min-width:0}
.sample .facts{margin:0 0 8px;font-size:13px}
.sample .prompt{
  color:var(--soft);border-left:3px solid var(--line);padding-left:10px;margin-bottom:8px}
.sample.wide{grid-column:1/-1}
.sample.wide .facts{margin:14px 0 6px;border-top:1px solid var(--line);padding-top:10px}
.fork{display:grid;grid-template-columns:1fr 1fr;gap:14px;margin-top:8px}
.fork>div{border-left:3px solid var(--line);padding-left:10px;min-width:0}
.fork h4{margin:0;font-size:12px;font-weight:400;color:var(--soft)}
mark.reused,pre.kept b{background:#d3ebd9;color:inherit;border-radius:2px}
pre b{font-weight:400;position:relative}
pre.gone,s{color:#8a8f98;text-decoration:line-through}
pre.gone b.cut,b.cut{color:#a3200d;background:#fbdcd5;font-weight:600;border-radius:2px}
pre.new b,b.fresh{background:#dbe9fb;font-weight:400;border-radius:2px}
pre b:hover{outline:2px solid #4a5260}
pre b:hover::after{
  position:absolute;left:0;top:calc(100% + 5px);z-index:9;padding:6px 10px;border-radius:6px;
  background:#1d2229;color:#fff;font:12px/1.45 system-ui,sans-serif;white-space:pre;
  text-decoration:none;pointer-events:none;content:"token " attr(data-i)}
pre b[data-l]:hover::after{content:"token " attr(data-i) "\A log-prob " attr(data-l)}
pre b[data-q]:hover::after{content:"token " attr(data-i) "\A old log-prob " attr(data-q)}
pre b[data-p]:hover::after{content:"token " attr(data-i) "\A new log-prob " attr(data-p)}
pre b[data-q][data-p]:hover::after{
  content:"token " attr(data-i) "\A old log-prob " attr(data-q) "\A new log-prob " attr(data-p)}
pre b[data-q][data-u]:hover::after{
  content:"token " attr(data-i) "\A old log-prob " attr(data-q) "\A new log-prob " attr(data-p)
  "\A kept up to " attr(data-h) "\A draw " attr(data-u)}
.problems{
  background:#fff6e0;border:1px solid #ecd9a4;border-radius:8px;padding:10px 16px;
  margin:16px 0}
.problems ul{margin:4px 0;padding-left:20px}
@media(max-width:560px){main{padding:20px 12px}.samples,.fork{grid-template-columns:1fr}}
"""
